"use strict";
// Every figure of the page is JSON beside the place where it is drawn.

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Changes of a layout that bring the colours of the page into a plot. */
function colours(layout) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim();
  const line = style.getPropertyValue("--line").trim();
  const changes = {"font.color": ink};
  for (const axis of Object.keys(layout).filter(key => /^[xy]axis/.test(key))) {
    for (const part of ["gridcolor", "zerolinecolor", "linecolor"]) {
      changes[`${axis}.${part}`] = line;
    }
  }
  return changes;
}

const plots = [...document.querySelectorAll(".plot")];

function draw() {
  for (const plot of plots) {
    const figure = JSON.parse(plot.querySelector("script").textContent);
    Plotly.newPlot(plot, figure.traces, figure.layout, {displayModeBar: false, responsive: true});
  }
}

function paint() {
  for (const plot of plots) {
    Plotly.relayout(plot, colours(plot.layout));
    Plotly.Plots.resize(plot); // it was drawn before the page had its scroll bar
  }
}

draw();
dark.addEventListener("change", paint);
addEventListener("load", paint);
