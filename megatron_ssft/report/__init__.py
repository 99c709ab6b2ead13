"""A report on runs and evaluations: `read` reads them back, `figures` draws them, `page` writes one HTML page."""
