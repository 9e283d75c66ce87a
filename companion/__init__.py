"""What makes this book from flowlib: its experiments, records, tables and figures."""
