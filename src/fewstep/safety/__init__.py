"""The settings that images carry in their metadata, and how far they are trusted."""
