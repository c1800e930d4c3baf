"""Questions with answers: who answers how many of them rightly, and how sure that difference is."""
