"""Who is where: signed records, the directory that spreads them, and who is alive."""
