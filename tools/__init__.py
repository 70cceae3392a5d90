"""What makes or measures files of the repository, but is no part of the package."""
