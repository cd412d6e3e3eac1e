"""What these implementations are called."""

NAME = "tml"
