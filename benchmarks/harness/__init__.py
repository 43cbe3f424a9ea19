"""What every measurement is made with: results, the report, engines, timers."""
