"""The prompt page: any run that draws, behind a page and an HTTP interface."""
