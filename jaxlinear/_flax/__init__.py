"""What the modules for both APIs of Flax share: the only private folder with Flax."""
