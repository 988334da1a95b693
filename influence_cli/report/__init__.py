"""One HTML page of score tables: reads tables, collects examples and pictures, writes the page."""
