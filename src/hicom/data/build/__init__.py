"""Building instruction-description data out of raw videos: the recipe of HICom-248K (paper, 3.2 and B.2)."""
