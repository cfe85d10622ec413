"""What of a conversation need not be sent: lines already shown, and the middle of what is long."""
