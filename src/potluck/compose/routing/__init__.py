"""Several participants' adapters in one model, chosen anew for every token: whole ones (Arrow), or rank by rank."""
