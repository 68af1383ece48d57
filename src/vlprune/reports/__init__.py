"""Views of what a run found out: text, Markdown, a page."""
