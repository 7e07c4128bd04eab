"""Experts that participants train apart beside one frozen base, and the mixture that they make, and can leave."""
