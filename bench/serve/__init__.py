"""Models of real size on replayed routing: cells, their figures and the report."""
