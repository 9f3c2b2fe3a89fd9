"""Operations on pages: `reference` is the plain-torch definition of each."""
