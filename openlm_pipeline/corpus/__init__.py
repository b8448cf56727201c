"""Raw text: finding files, reading records, quarantining bad ones, and the embedded demo corpus."""
