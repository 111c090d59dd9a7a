"""Results that are kept to be used again, and what decides whether they may be."""
