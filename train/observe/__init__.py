"""What a run says about itself: losses, times, events."""
