"""Pictures without a window: a matplotlib canvas and the grid that shows what each branch of IKD sees."""
