"""Where text comes from: files to records, records to documents, documents cleaned and counted."""
