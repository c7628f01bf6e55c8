"""The KV cache: which blocks belong to whom (`blocks`) and where the bytes are (`pool`)."""
