"""What developers and the demo need. Nothing in overlay/ imports anything from here."""
