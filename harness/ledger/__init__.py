"""What happened: the run tree on disk, written atomically, readable without this package."""
