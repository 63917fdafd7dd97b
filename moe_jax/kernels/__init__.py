"""One module per operation: the public function, its fast versions, and the plain reference they are tested against."""
