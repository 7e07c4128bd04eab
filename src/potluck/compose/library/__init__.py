"""A library of adapters: kept with what they are good for, found by likeness, clustered, and routed between."""
