"""WASH populations for the Hugging Face Trainer."""
