"""The layers every model of the family is made of; torch only."""
