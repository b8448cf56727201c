"""The home and its layout, files whole or not at all, remote copies."""
