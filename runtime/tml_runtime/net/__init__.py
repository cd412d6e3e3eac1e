"""What comes over a network: when it is to be heard, and lines that are bad on purpose."""
