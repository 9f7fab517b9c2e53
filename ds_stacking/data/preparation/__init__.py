"""From a stream of documents to a prepared folder: cleaned, without duplicates, tokenised, its held-out part apart."""
