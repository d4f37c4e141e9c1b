"""What `bench serve` measures, one file per question; `clients` has the server process and those who call it."""
