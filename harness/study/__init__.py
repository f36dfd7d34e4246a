"""What to run: schema, sizes, grid expansion, stage identity, cost, plan. Imports no torch."""
