"""What is published beside a model: its training record, emissions, licence and model card."""
