"""From prompts to tokens: vocabularies, windows longer than the text tower's, and weights on words."""
