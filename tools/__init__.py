"""What makes or measures files of the repository; no part of the package."""
