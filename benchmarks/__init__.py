"""What potluck costs, measured as ratios: `make bench`, `make bench-full`, with `PEERS=1` beside other systems."""
