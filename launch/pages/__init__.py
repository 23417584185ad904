"""The sections of the page that `rowwise.launch.report` writes of runs; `page` has them in order."""
