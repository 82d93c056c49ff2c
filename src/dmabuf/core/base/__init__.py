"""What every room stands on, without a buffer or a fence."""
