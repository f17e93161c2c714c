"""Self-contained pages about runs: `figures` draws, `page` writes HTML, `content` reads run directories."""
