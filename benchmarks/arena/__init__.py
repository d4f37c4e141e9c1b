"""Two models side by side, blind: people say which picture they like better."""
