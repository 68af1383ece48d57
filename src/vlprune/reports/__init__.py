"""Views of the plain report of a run: text, Markdown, a model card, a page."""
