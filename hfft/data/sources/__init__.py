"""Where rows and labels come from: folders, tables, tars, the Hub; and their splits."""
