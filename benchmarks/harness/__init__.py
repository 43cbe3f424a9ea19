"""What all measurements use: results, the report, engines that take turns, timers, plots."""
