"""One decoder for Llama, Mistral, Qwen2, Qwen3 and SmolLM: configuration, layers, loading."""
