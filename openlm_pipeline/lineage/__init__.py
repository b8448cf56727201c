"""What a thing is, apart from where and how it was made."""
