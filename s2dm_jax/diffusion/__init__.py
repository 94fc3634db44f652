"""The mathematics of both papers: noise schedules, what a network predicts, training objectives."""
