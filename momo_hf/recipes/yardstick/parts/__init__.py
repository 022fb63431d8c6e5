"""What several tasks share: how rows are made, and how a kind of model is measured."""
