"""Report pages: a record describes a page, which is written as HTML or Markdown."""
