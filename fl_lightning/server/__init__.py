"""What the server makes of releases: cohorts, means, its optimizer."""
