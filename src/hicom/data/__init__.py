"""Training data: records, cached vision features and collation."""
