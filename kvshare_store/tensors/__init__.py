"""What a row is: its layout, its position, its bytes."""
