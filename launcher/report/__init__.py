"""From run directories to one page: read, thin out, draw as plotly's JSON, and write a single HTML file."""
